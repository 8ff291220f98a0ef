"""What a user sees while something runs, and what results print."""
