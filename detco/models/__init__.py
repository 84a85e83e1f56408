"""Networks and the state that travels with them: trunk, heads, momentum copy, queue of keys, batch shuffling."""
