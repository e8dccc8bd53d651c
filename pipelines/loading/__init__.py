"""Check and load a catalog entry's components: folders, single files and quantized weights."""
