"""The two commands. Click only: every decision is made in the packages below, which are imported when a command runs."""
