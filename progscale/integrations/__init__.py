"""Progressive stages for loops that are not progscale's own."""
