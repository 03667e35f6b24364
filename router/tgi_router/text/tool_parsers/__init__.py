"""The formats in which models write calls of tools, one file each, behind `message.Parser`."""
