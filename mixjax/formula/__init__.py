"""From text and a table to a Design and its Labels."""
