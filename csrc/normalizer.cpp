#include "normalizer.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "utf8.hpp"

namespace cpt {

namespace {

bool has_leaf(std::uint32_t unit) { return (unit >> 8) & 1; }
std::uint32_t value_of(std::uint32_t unit) { return unit & 0x7fffffffu; }
std::uint32_t label_of(std::uint32_t unit) { return unit & 0x800000ffu; }
std::uint32_t offset_of(std::uint32_t unit) { return (unit >> 10) << ((unit & 0x200u) >> 6); }

}  // namespace

CharsMap::CharsMap(std::string_view table) {
  if (table.empty()) return;
  std::uint32_t bytes = 0;
  if (table.size() > sizeof bytes) std::memcpy(&bytes, table.data(), sizeof bytes);
  if (bytes < 4 || bytes % 4 != 0 || bytes >= table.size() - sizeof bytes) {
    throw std::invalid_argument("the model's table of replacements is damaged");
  }
  units_.resize(bytes / 4);
  std::memcpy(units_.data(), table.data() + sizeof bytes, bytes);
  texts_ = table.substr(sizeof bytes + bytes);
}

bool CharsMap::begins(unsigned char byte) const {
  if (empty()) return false;
  const std::size_t node = offset_of(units_[0]) ^ byte;
  return node < units_.size() && label_of(units_[node]) == byte;
}

std::size_t CharsMap::match(std::string_view text, std::string_view& replacement) const {
  if (empty()) return 0;
  std::size_t longest = 0;
  std::size_t node = offset_of(units_[0]);
  for (std::size_t at = 0; at < text.size(); ++at) {
    const auto byte = static_cast<unsigned char>(text[at]);
    node ^= byte;
    if (node >= units_.size() || label_of(units_[node]) != byte) break;
    const std::uint32_t unit = units_[node];
    node ^= offset_of(unit);
    if (!has_leaf(unit) || node >= units_.size()) continue;
    const std::size_t start = value_of(units_[node]);
    if (start >= texts_.size()) continue;
    longest = at + 1;
    replacement = std::string_view(texts_).substr(start);
    replacement = replacement.substr(0, replacement.find('\0'));
  }
  return longest;
}

Normalizer::Normalizer(const NormalizerSettings& settings, const std::vector<std::string>& protected_texts)
    : settings_(settings), charsmap_(settings.charsmap) {
  for (const std::string& text : protected_texts) protected_.add(text, 0);
  for (unsigned byte = 0; byte < 256; ++byte) {
    // A byte inside a character is reached only behind a first byte that is plain.
    plain_[byte] = (byte >= 0x80 && byte < 0xc0) ||
                   !(charsmap_.begins(static_cast<unsigned char>(byte)) || protected_.begins(static_cast<char>(byte)));
  }
  if (settings_.remove_extra_whitespaces) plain_[' '] = false;
  if (settings_.escape_whitespaces) plain_[static_cast<unsigned char>(kSpaceSymbol[0])] = false;
  copies_ = charsmap_.empty() && protected_.empty() && !settings_.remove_extra_whitespaces;
}

void Normalizer::operator()(std::string_view text, std::string& normal) const {
  normal.clear();
  if (settings_.remove_extra_whitespaces) {
    while (!text.empty()) {
      const Step step = next(text);
      if (step.replacement != " ") break;
      text.remove_prefix(step.taken);
    }
  }
  if (text.empty()) return;
  normal.reserve(text.size() + 32);
  if (settings_.add_dummy_prefix && !settings_.whitespace_as_suffix) normal.push_back(' ');
  if (copies_) {
    normal.append(text);
  } else {
    rewrite(text, normal);
  }
  if (settings_.remove_extra_whitespaces) normal.resize(normal.find_last_not_of(' ') + 1);
  if (settings_.add_dummy_prefix && settings_.whitespace_as_suffix) normal.push_back(' ');
}

void Normalizer::rewrite(std::string_view text, std::string& normal) const {
  bool after_space = settings_.remove_extra_whitespaces;
  while (!text.empty()) {
    std::size_t run = 0;
    while (run < text.size() && plain_[static_cast<unsigned char>(text[run])]) ++run;
    if (run > 0) {
      normal.append(text.substr(0, run));
      text.remove_prefix(run);
      after_space = false;
      continue;
    }
    Step step = next(text);
    text.remove_prefix(step.taken);
    if (after_space) {
      step.replacement.remove_prefix(std::min(step.replacement.find_first_not_of(' '), step.replacement.size()));
    }
    if (!step.replacement.empty()) {
      append(step.replacement, normal);
      after_space = settings_.remove_extra_whitespaces && step.replacement.back() == ' ';
    }
  }
}

Normalizer::Step Normalizer::next(std::string_view text) const {
  if (protected_.begins(text.front())) {
    const std::size_t length = protected_.match(text).length;
    if (length > 0) return {text.substr(0, length), length};
  }
  std::string_view replacement;
  const std::size_t taken = charsmap_.match(text, replacement);
  if (taken > 0) return {replacement, taken};
  const std::size_t length = std::min(text.size(), utf8::length(text.front()));
  return {text.substr(0, length), length};
}

void Normalizer::append(std::string_view text, std::string& normal) const {
  if (!settings_.escape_whitespaces) {
    normal.append(text);
    return;
  }
  while (!text.empty()) {
    const std::size_t at = text.find(kSpaceSymbol);
    normal.append(text.substr(0, at));
    if (at == std::string_view::npos) return;
    normal.push_back(' ');
    text.remove_prefix(at + kSpaceSymbol.size());
  }
}

}  // namespace cpt
