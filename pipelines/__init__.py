"""Turn image requests into images: model families, and placements of their weights."""
