"""Inference: a mask for every box of a file, as parquet shards and one merged COCO JSON."""
