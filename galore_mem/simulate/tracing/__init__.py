"""The program as it runs without values: every storage followed, and what torch decides by device or value answered."""
