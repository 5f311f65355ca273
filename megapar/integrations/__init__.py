"""What lets code written for other libraries run on megapar's ops."""
