"""Work out which placements of a model fit which devices, from the sizes in its configs."""
