"""The example: a payment is taken once, announced, charged once, and looked up."""
