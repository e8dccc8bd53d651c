"""From a catalog entry to checked, loaded components: folders, single files, quantized weights."""
