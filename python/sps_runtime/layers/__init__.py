"""What models are made of: layers that know placements, so that models need not."""
