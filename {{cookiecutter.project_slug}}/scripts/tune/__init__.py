"""`make tune`: how many processes, and how many jobs at once, suit this machine and these jobs."""
