"""Tasks with right and wrong answers, item by item against the model's own cache dtype."""
