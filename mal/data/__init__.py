"""What goes into the network: COCO files, the index of boxes, images, rendered scenes."""
