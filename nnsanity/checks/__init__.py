"""The checklist, one file an item: what is measured, and what it means."""
