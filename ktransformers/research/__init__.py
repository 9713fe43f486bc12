"""What the command line's verbs call to explain and to measure; returns data, prints nothing."""
