"""The two commands. Click only: every decision is made in the packages below, imported when a command runs."""
