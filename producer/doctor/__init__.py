"""`doctor`: looks at everything that the backend's side stands on, and says what to do where it does not hold."""
