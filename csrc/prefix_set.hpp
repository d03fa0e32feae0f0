// The longest member of a set of byte strings that a text begins with.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace cpt {

// A trie: one hashed edge a byte. `begins` answers most questions before it is walked.
class PrefixSet {
 public:
  struct Match {
    std::size_t length = 0;  // in bytes; 0: no member
    std::uint32_t value = 0;
  };

  // Members must not be empty; a member that is added twice keeps its last value.
  void add(std::string_view member, std::uint32_t value) {
    std::uint32_t node = 0;
    begins_[static_cast<unsigned char>(member.front())] = true;
    for (const char byte : member) {
      node = edges_.emplace(edge(node, byte), static_cast<std::uint32_t>(edges_.size()) + 1).first->second;
    }
    ends_[node] = value;
  }

  bool empty() const { return ends_.empty(); }

  bool begins(char byte) const { return begins_[static_cast<unsigned char>(byte)]; }

  Match match(std::string_view text) const {
    Match longest;
    std::uint32_t node = 0;
    for (std::size_t at = 0; at < text.size(); ++at) {
      const auto next = edges_.find(edge(node, text[at]));
      if (next == edges_.end()) break;
      node = next->second;
      if (const auto end = ends_.find(node); end != ends_.end()) longest = {at + 1, end->second};
    }
    return longest;
  }

 private:
  static std::uint64_t edge(std::uint32_t node, char byte) {
    return (std::uint64_t{node} << 8) | static_cast<unsigned char>(byte);
  }

  std::array<bool, 256> begins_{};
  std::unordered_map<std::uint64_t, std::uint32_t> edges_;
  std::unordered_map<std::uint32_t, std::uint32_t> ends_;
};

}  // namespace cpt
