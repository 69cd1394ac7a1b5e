"""Front ends. Each turns its own requests into one `Engine.predict` call and the answers back."""
