"""Rules of the tests themselves: what they may cost, which tier they belong to, how they share what is expensive."""
