"""Plain Python and torch: load a model, run a batch, tell what an item costs. Nothing here knows Ray or HTTP.

An engine is one class in one file. To serve a new kind of model, write one and name it in a config as
`task: MODULE:CLASS`.
"""
