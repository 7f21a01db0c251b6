"""From planned GEMMs to the quantised IR: rotate, quantise, share."""
