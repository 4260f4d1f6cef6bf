"""What finished runs say beside each other, from their files alone."""
