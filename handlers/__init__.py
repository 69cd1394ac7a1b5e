"""Front ends. Each translates its requests into one `Engine.predict` call, and the answers back."""
