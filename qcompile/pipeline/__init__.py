"""What a pass is, how pipelines are written, completed and run."""
