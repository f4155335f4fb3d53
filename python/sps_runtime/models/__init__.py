"""Models, which hold only maths, and how their weights come into memory."""
