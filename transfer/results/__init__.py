"""Tables of transfer results: our run directories beside the published numbers, generated and never typed.

`runs` reads run directories, `repeats` averages them over seeds, `reference` holds the published numbers, `identity`
says which published row our weights correspond to, `published` and `ours` make the rows, `tables` puts them side by
side; `text`, `markup` and `records` write them. Neither torch nor Detectron2 is needed.
"""
