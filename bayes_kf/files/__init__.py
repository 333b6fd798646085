"""Files written as a whole: staging folders, atomic saves, ownership, checksums."""
