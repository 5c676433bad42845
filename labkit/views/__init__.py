"""Views: render() turns a snapshot into pictures, tables and text; widgets only carry them to a browser and clicks back."""
