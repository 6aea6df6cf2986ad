"""The graph's door to the pack: one file per group of nodes. They parse, call and report; the work is elsewhere."""
