"""A trained or pretrained model for users, over HTTP."""
