"""What reads an encoder: classifiers, frozen and fine-tuned, and encoders from elsewhere."""
