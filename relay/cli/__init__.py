"""The command `relay`: settings, check-key, chat, doctor. It reads, asks and prints; nothing imports it."""
