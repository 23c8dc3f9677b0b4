"""The labelling line: shards of the index in, label rows out, on a Ray Data pool of actors that hold the network.

Inference and evaluation both use it; what they do with the rows differs.
"""
