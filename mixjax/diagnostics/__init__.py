"""What a fit leaves over, and what drives it."""
