"""Training of the embedded model: drawn avatars, synthetic speech, autoencoder and flow matching."""
