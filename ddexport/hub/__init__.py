"""The Hugging Face Hub: checkpoints and bundles fetched from it, bundles published on it."""
