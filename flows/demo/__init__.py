"""The demo: the pipeline on 5,400 emoji images, served locally."""
