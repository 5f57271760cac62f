"""What a model is: loading and saving, safe edits, structures, decisions."""
