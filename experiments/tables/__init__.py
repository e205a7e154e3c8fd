"""Tables of experiments: their columns, the selection of runs, and the pages made of them."""
