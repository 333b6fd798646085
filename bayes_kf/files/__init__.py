"""Files written as a whole: staging, atomic commits, ownership, checksums. Knows nothing of posteriors and reports."""
