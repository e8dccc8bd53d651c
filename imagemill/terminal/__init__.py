"""What commands show in a terminal: tables, bars, pictures and contact sheets."""
