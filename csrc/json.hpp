// A strict reader of JSON (RFC 8259) over one line: it finds values, and decodes only those asked for.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

namespace cpt {

enum class JsonKind { missing, object, array, string, number, boolean, null };

// A value as it stands in the line: the bytes of a string without its quotes.
struct JsonValue {
  JsonKind kind = JsonKind::missing;
  bool escaped = false;  // a string with a backslash in it
  std::string_view raw;
};

// What a value is, in the words of an error message.
const char* name_of(JsonKind kind);

// Where a line departs from JSON.
struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Appends the characters of a string value. Returns false, and leaves `out` alone, where half of a
// surrogate pair stands alone: JSON can spell that and UTF-8 cannot.
bool append_string(const JsonValue& value, std::string& out);

// Whether a key spells `name`.
bool spells(const JsonValue& key, std::string_view name);

// Appends a text as a JSON string with its quotes: what must be escaped is, and nothing else.
void append_quoted(std::string_view text, std::string& out);

// Reads values from the front to the back of one line of valid UTF-8. Nesting takes no stack.
class JsonScanner {
 public:
  explicit JsonScanner(std::string_view line) : begin_(line.data()), at_(begin_), end_(begin_ + line.size()) {}

  // Calls visit(key, value) for every member of the object that the line holds.
  // Throws JsonError where the line is anything but one value; returns its kind.
  template <typename Visit>
  JsonKind scan(Visit visit) {
    skip_space();
    JsonKind kind = JsonKind::object;
    if (peek() == '{') {
      scan_object(visit);
    } else {
      kind = value().kind;
    }
    skip_space();
    if (at_ != end_) fail("the end of the line");
    return kind;
  }

 private:
  template <typename Visit>
  void scan_object(Visit& visit) {
    ++at_;
    skip_space();
    if (peek() == '}') {
      ++at_;
      return;
    }
    for (;;) {
      const JsonValue name = key();
      visit(name, value());
      skip_space();
      const char next = peek();
      if (next != ',' && next != '}') fail("',' or '}'");
      ++at_;
      if (next == '}') return;
      skip_space();
    }
  }

  char peek() const { return at_ < end_ ? *at_ : '\0'; }

  void skip_space() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r' || *at_ == '\n')) ++at_;
  }

  JsonValue key();
  JsonValue value();
  JsonValue string();
  JsonKind container();
  JsonKind scalar();
  void escape();
  void digits();
  void number();
  void word(std::string_view expected);
  [[noreturn]] void fail(const std::string& expected) const;

  const char* begin_;
  const char* at_;
  const char* end_;
};

}  // namespace cpt
