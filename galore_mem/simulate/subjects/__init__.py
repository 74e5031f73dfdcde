"""What is simulated: a bundled or described model, one of the user's own, and other releases of transformers."""
