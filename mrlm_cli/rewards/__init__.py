"""What scores finished sessions, next to the environments' own components."""
