"""One store, a whole team: HTTP in front of stores."""
