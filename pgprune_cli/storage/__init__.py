"""Files that are whole or absent, and records that carry their checksum."""
