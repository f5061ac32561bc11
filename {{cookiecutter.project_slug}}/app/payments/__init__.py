"""The example: a payment is taken, stored and looked up."""
