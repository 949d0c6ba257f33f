"""The built-in model families, one file each; a file registers its family when it is imported."""
