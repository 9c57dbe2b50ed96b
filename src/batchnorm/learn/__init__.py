"""The page on which batch normalization can be touched: one file, made from the modules, strings and styles of this folder."""
